"""``python -m compat``: which hooks this interpreter's Flower allows, as JSON.

The ``medfed upgrade check`` of another environment asks this way.
"""

import json

from . import report
from .state_database import known_revisions, newest_revisions

if __name__ == "__main__":
    revisions = {
        "revisions": sorted(newest_revisions()),
        "all_revisions": sorted(known_revisions()),
    }
    print(json.dumps({**report().as_json(), **revisions}))
