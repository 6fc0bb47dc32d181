"""The SuperLink keeps "nothing yet" back until there is something, and only for who may know."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)

from compat import long_polling

FLEET_PULL = "/v1/fleet/pull-messages"
RUNTIME_PULL = "/v1/runtime/pull-messages"
ACQUIRE = "/v1/runtime/acquire-task"


class Flower:
    """As much of the SuperLink's application as the middleware sees."""

    def __init__(self) -> None:
        self.inbox: dict[int, list[str]] = {}
        self.replies: list[str] = []
        self.tasks: list[str] = []
        self.asked: list[str] = []
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.asked.append(path)
        body = (await receive())["body"]
        answer: Any = b""
        if path == FLEET_PULL:
            node = PullMessagesRequest.FromString(body).node.node_id
            mail = self.inbox.get(node, [])
            found = [Message(metadata=Metadata(message_id=mail.pop(0)))] if mail else []
            answer = PullMessagesResponse(messages_list=found)
        elif path == RUNTIME_PULL:
            wanted = PullAppMessagesRequest.FromString(body).message_ids
            found = [
                Message(metadata=Metadata(reply_to_message_id=i))
                for i in wanted
                if i in self.replies
            ]
            answer = PullAppMessagesResponse(messages_list=found)
        elif path == "/v1/runtime/push-messages":
            for sent in PushAppMessagesRequest.FromString(body).messages_list:
                self.inbox.setdefault(sent.metadata.dst_node_id, []).append("message")
            answer = PushAppMessagesResponse(objects_to_push=["a", "b"])
        elif path == "/v1/fleet/push-messages":
            for sent in PushMessagesRequest.FromString(body).messages_list:
                self.replies.append(sent.metadata.reply_to_message_id)
            answer = PushMessagesResponse(objects_to_push=["c"])
        elif path == "/v1/control/start-run":
            self.tasks.append("token")
            answer = AcquireTaskResponse(token="started")
        elif path == ACQUIRE:
            answer = AcquireTaskResponse(token=self.tasks.pop() if self.tasks else "")
        elif path.endswith("push-object"):
            answer = PushObjectResponse(stored=True)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        content = answer.SerializeToString() if self.status == 200 and answer else b""
        await send({"type": "http.response.body", "body": content})


class World:
    """A middleware around ``Flower`` and requests to it."""

    def __init__(self, hold: float = 30.0, settle: float = 30.0) -> None:
        self.flower = Flower()
        self.calls_for_superexec = 0
        self.poll = long_polling.LongPoll(self.flower, hold, hold, settle, self.call_superexec)

    def call_superexec(self) -> None:
        assert self.flower.tasks, "before the task is there, calling is useless"
        self.calls_for_superexec += 1

    async def request(self, path: str, body: Any, gone: asyncio.Event | None = None) -> bytes:
        unread = [{"type": "http.request", "body": body.SerializeToString(), "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(event: Any) -> None:
            sent.append(event)

        await self.poll({"type": "http", "method": "POST", "path": path}, receive, send)
        assert [event["type"] for event in sent] == ["http.response.start", "http.response.body"]
        return sent[1]["body"]

    async def pull(self, node: int, gone: asyncio.Event | None = None) -> int:
        request = PullMessagesRequest(node=Node(node_id=node))
        answer = await self.request(FLEET_PULL, request, gone)
        return len(PullMessagesResponse.FromString(answer).messages_list)

    async def pull_reply(self, *message_ids: str) -> int:
        answer = await self.request(RUNTIME_PULL, PullAppMessagesRequest(message_ids=message_ids))
        return len(PullAppMessagesResponse.FromString(answer).messages_list)

    async def push(self, *nodes: int) -> None:
        sent = [Message(metadata=Metadata(dst_node_id=node)) for node in nodes]
        await self.request("/v1/runtime/push-messages", PushAppMessagesRequest(messages_list=sent))

    async def push_reply(self, to: str) -> None:
        sent = [Message(metadata=Metadata(reply_to_message_id=to))]
        await self.request("/v1/fleet/push-messages", PushMessagesRequest(messages_list=sent))

    async def push_object(self, object_id: str, api: str = "runtime") -> None:
        request = PushObjectRequest(object_id=object_id, object_content=b"x" * 100)
        await self.request(f"/v1/{api}/push-object", request)

    async def settled(self) -> None:
        """Let everything that can go on go on."""
        for _ in range(50):
            await asyncio.sleep(0)


def scenario(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    """Run a test of a world, with a deadline."""

    def run() -> None:
        async def limited() -> None:
            async with asyncio.timeout(5):
                await test(World())

        asyncio.run(limited())

    run.__doc__ = test.__doc__
    return run


@scenario
async def test_a_node_hears_of_its_message_once_all_its_objects_are_there(world):
    question = asyncio.ensure_future(world.pull(7))
    await world.settled()
    await world.push(7)
    await world.push_object("a")
    await world.settled()
    assert not question.done()
    await world.push_object("b")
    assert await question == 1


@scenario
async def test_a_message_is_not_handed_out_while_its_objects_are_on_their_way(world):
    await world.push(7)
    question = asyncio.ensure_future(world.pull(7))
    await world.settled()
    assert FLEET_PULL not in world.flower.asked
    await world.push_object("b")
    await world.push_object("a")
    assert await question == 1


@scenario
async def test_a_question_that_waits_for_its_turn_does_not_overtake_an_upload(world):
    """Else the node would have the message, miss its objects and wait a second for them."""
    await world.poll._turn.acquire()
    push = asyncio.ensure_future(world.push(7))
    await world.settled()
    question = asyncio.ensure_future(world.pull(7))
    other = asyncio.ensure_future(world.pull(8))
    await world.settled()
    world.poll._turn.release()
    await push
    await world.settled()
    assert world.flower.asked.count(FLEET_PULL) == 1  # the other's
    await world.push_object("a")
    await world.push_object("b")
    assert await question == 1
    world.poll.board.close()
    assert await other == 0


@scenario
async def test_requests_reach_flower_one_at_a_time(world):
    inside = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        inside.append(1)
        assert len(inside) == 1
        await world.settled()
        inside.pop()
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    world.poll._app = slow
    object_ = PushObjectRequest(object_id="a")
    await asyncio.gather(
        *(world.request("/v1/fleet/push-object", object_) for _ in range(5)),
        *(world.request("/v1/runtime/pull-object", object_) for _ in range(5)),
        *(world.pull(node) for node in range(5)),
    )


@scenario
async def test_a_request_whose_client_went_away_while_sending_it_never_reaches_flower(world):
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    for path in ("/v1/fleet/push-object", FLEET_PULL, "/v1/fleet/push-messages"):
        await world.poll({"type": "http", "method": "POST", "path": path}, receive, receive)
    assert world.flower.asked == []


@scenario
async def test_nodes_that_were_not_sampled_are_not_woken(world):
    others = [asyncio.ensure_future(world.pull(node)) for node in (1, 2, 3)]
    await world.settled()
    before = len(world.flower.asked)
    await world.push(7)
    await world.push_object("a")
    await world.push_object("b")
    await world.settled()
    assert len(world.flower.asked) == before + 3
    assert not any(other.done() for other in others)
    world.poll.board.close()
    assert [await other for other in others] == [0, 0, 0]


@scenario
async def test_the_server_app_hears_of_a_reply_once_it_is_complete(world):
    question = asyncio.ensure_future(world.pull_reply("m1", "m2"))
    await world.settled()
    await world.push_reply("m2")
    await world.settled()
    assert not question.done()
    await world.push_object("c", "fleet")
    assert await question == 1


@scenario
async def test_superexec_is_called_when_a_run_is_submitted_and_never_kept_waiting(world):
    answer = await world.request(ACQUIRE, AcquireTaskRequest())
    assert AcquireTaskResponse.FromString(answer).token == ""
    assert world.calls_for_superexec == 0
    await world.request("/v1/control/start-run", AcquireTaskRequest())
    assert world.calls_for_superexec == 1
    answer = await world.request(ACQUIRE, AcquireTaskRequest())
    assert AcquireTaskResponse.FromString(answer).token == "token"


@scenario
async def test_an_answer_that_flower_refused_is_not_held(world):
    world.flower.status = 401
    assert await world.pull(7) == 0
    assert world.flower.asked == [FLEET_PULL]


@scenario
async def test_a_push_that_flower_refused_hides_nothing(world):
    world.flower.status = 403
    await world.push(7)
    assert not world.poll.board.uploads


@scenario
async def test_no_message_is_claimed_for_a_node_that_has_gone(world):
    gone = asyncio.Event()
    question = asyncio.ensure_future(world.pull(7, gone))
    await world.settled()
    gone.set()
    assert await question == 0
    await world.push(7)
    await world.push_object("a")
    await world.push_object("b")
    assert world.flower.asked.count(FLEET_PULL) == 1
    assert world.flower.inbox[7] == ["message"]
    assert await world.pull(7) == 1


@scenario
async def test_a_node_that_asks_again_gets_its_message_on_the_new_question(world):
    old = asyncio.ensure_future(world.pull(7))
    await world.settled()
    new = asyncio.ensure_future(world.pull(7))
    assert await old == 0
    await world.push(7)
    await world.push_object("a")
    await world.push_object("b")
    assert await new == 1


@scenario
async def test_a_superlink_that_stops_keeps_nobody(world):
    questions = [asyncio.ensure_future(world.pull(node)) for node in range(3)]
    await world.settled()
    world.poll.board.close()
    assert [await question for question in questions] == [0, 0, 0]
    assert await world.pull(9) == 0


def test_nobody_is_held_for_longer_than_agreed():
    async def test() -> None:
        async with asyncio.timeout(5):
            assert await World(hold=0.01).pull(7) == 0

    asyncio.run(test())


def test_an_upload_that_never_ends_hides_its_message_only_for_a_while():
    async def test() -> None:
        async with asyncio.timeout(5):
            world = World(settle=0.01)
            await world.push(7)
            assert await world.pull(7) == 1

    asyncio.run(test())


@scenario
async def test_a_body_that_is_not_protobuf_goes_to_flower_as_it_is(world):
    class Garbage:
        def SerializeToString(self) -> bytes:  # noqa: N802
            return b"\xff\xff\xff"

    world.flower.status = 400
    assert await world.request("/v1/fleet/push-object", Garbage()) == b""


@scenario
async def test_other_requests_pass(world):
    assert await world.request("/v1/control/list-runs", PullMessagesRequest()) == b""
    assert world.flower.asked == ["/v1/control/list-runs"]
