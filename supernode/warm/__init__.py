"""ClientApps forked from a warm process instead of started cold for every message.

SuperExec starts ``flwr-clientapp`` from PATH for every message: a new Python that imports torch,
transformers and peft (8 to 14 s on two cores) and loads the base model. Here that is done once:

- ``python -m supernode.warm serve`` keeps a warm process alive (``supervisor``): it imports and
  loads base models (``preload``), stays single-threaded and without CUDA, and then does nothing
  but accept, fork and reap (``server``);
- ``bin/flwr-clientapp``, first on a SuperNode's PATH, hands each message to it (``launcher``);
- the forked child becomes a ``flwr-clientapp`` (``child``), runs the FAB's code, and ends.

One warm process serves every SuperNode of the same user on a machine; a container has its own.
Flower 1.41 has warm executors of its own, but only on Kubernetes and not for ClientApps
(``flwr.supercore.superexec.executor.warm_executor_pool``), so they cannot do this.
"""
