"""An engine in a thread of its own, and the requests that an event loop has in it.

All that touches the engine happens in that thread, between two steps: commands go in through a queue, outputs come out
through the event loop. Everything else here runs in the event loop.
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe_lm.engine import Engine, Output, SamplingParams
from moe_lm.server.errors import ApiError, Failed, Overloaded, TimedOut, Unavailable
from moe_lm.server.limits import Limits
from moe_lm.server.metrics import Metrics

T = TypeVar("T")

RATE_SECONDS = 5
"""Over which the rate of new tokens is measured."""
LONGEST_PAUSE = 0.1
"""Seconds between two events of a stream, however many there are."""
LONGEST_RETRY = 60
"""Seconds; Retry-After says no more."""


@dataclass(eq=False)
class Job:
    """One prompt for the engine."""

    request_id: str
    tokens: list[int]
    params: SamplingParams

    @property
    def cost(self) -> int:
        """Tokens that it may take."""
        return len(self.tokens) + self.params.n * self.params.max_tokens


@dataclass(eq=False)
class Call:
    """One HTTP request's prompts, and what the engine has given and nobody has read yet.

    Outputs that nobody reads are joined, so a slow reader holds no more than its own text.
    """

    jobs: list[Job]
    arrived: float
    """time.monotonic() when the request did."""
    pause: Callable[[], float]
    """Least seconds from one reading to the next, asked anew each time; neither the first nor the end is held up."""
    going: set[tuple[str, int]] = field(init=False)
    """Samples that have not ended, by request id and index."""
    unread: dict[tuple[str, int], Output] = field(default_factory=dict)
    failure: ApiError | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    last: dict[tuple[str, int], float] = field(default_factory=dict)
    """When each sample got its last token."""
    due: float = 0
    """When there may be something to read next, by the event loop's clock."""
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self):
        self.going = {(job.request_id, index) for job in self.jobs for index in range(job.params.n)}

    def put(self, output: Output) -> None:
        key = output.request_id, output.index
        if key in self.unread:
            self.unread[key].extend(output)
        else:
            self.unread[key] = output
        if output.finish_reason:
            self.going.discard(key)
        loop = asyncio.get_running_loop()
        if not self.going or output.finish_reason == "error" or loop.time() >= self.due:
            self.ready.set()
        elif self.timer is None and self.due < math.inf:
            self.timer = loop.call_at(self.due, self.ready.set)

    def fail(self, error: ApiError) -> None:
        self.failure = self.failure or error
        self.ready.set()

    async def next(self) -> list[Output]:
        """What has come since the last time, once there is something. Raises what the call has failed with."""
        await self.ready.wait()
        self.ready.clear()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.due = asyncio.get_running_loop().time() + self.pause()
        outputs, self.unread = list(self.unread.values()), {}
        failed = next((output.error for output in outputs if output.finish_reason == "error"), None)
        if failed:
            raise Failed(failed, code="request_failed")
        if self.failure:
            raise self.failure
        return outputs


class Worker:
    """`prepare` runs first in the engine's thread, such as to bind threads to cores."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics, prepare: Callable[[], None] | None = None):
        self.engine, self.limits, self.metrics, self.prepare = engine, limits, metrics, prepare
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.unstarted: set[str] = set()
        """The thread's own: requests in the engine that no step has touched."""
        self.jobs: dict[str, tuple[Call, Job]] = {}
        """That have not ended, by request id."""
        self.waiting: dict[str, Job] = {}
        """Those that no step has touched."""
        self.streams = 0
        """Calls that are read as they come."""
        self.draining = False
        self.dead: BaseException | None = None
        self.died, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        self.arrivals: deque[tuple[float, int]] = deque()
        """When new tokens came, and how many, of the last RATE_SECONDS."""

    def start(self) -> None:
        """Begin, in the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the thread after the step that it is in."""
        self.commands.put(None)
        await asyncio.to_thread(self.thread.join)

    def run(self) -> None:
        """What the thread does."""
        try:
            if self.prepare:
                self.prepare()
            while self.obey():
                outputs = self.engine.step()
                started = self.unstarted - self.engine.unstarted()
                self.unstarted -= started
                if outputs or started:
                    self.tell(self.deliver, outputs, started, time.monotonic())
        # Whatever it is, all that wait must hear of it, and the process ends.
        except BaseException as error:
            self.tell(self.die, error)

    def obey(self) -> bool:
        """Run the commands that are there, and wait for one where there is nothing to compute. False at the end."""
        while True:
            try:
                command = self.commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def tell(self, what: Callable[..., None], *values: Any) -> None:
        # The loop may have been closed by then: a process that ends does not wait for a step.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(what, *values)

    def add(self, job: Job) -> None:
        """In the thread. What is wrong with one request ends that request alone."""
        try:
            self.engine.add(job.tokens, job.params, job.request_id)
            self.unstarted.add(job.request_id)
        except Exception as error:
            sentence = f"the request could not start: {error}"
            failed = [Output(job.request_id, i, finish_reason="error", error=sentence) for i in range(job.params.n)]
            self.tell(self.deliver, failed, {job.request_id}, time.monotonic())

    def abort(self, request_id: str) -> None:
        """In the thread."""
        self.engine.abort(request_id)
        self.unstarted.discard(request_id)

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """What `question` finds between two steps. Raises Unavailable when the engine is dead, and what it raises."""
        self.require_life()
        answer: asyncio.Future[T] = self.loop.create_future()

        def command() -> None:
            try:
                found = question(self.engine)
            except Exception as error:  # the asker's, who must not take the engine with him
                self.tell(lambda error=error: answer.done() or answer.set_exception(error))
            else:
                self.tell(lambda: answer.done() or answer.set_result(found))

        self.commands.put(command)
        died = asyncio.ensure_future(self.died.wait())
        await asyncio.wait((answer, died), return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        self.require_life()
        return await answer

    def require_life(self) -> None:
        if self.dead:
            raise Unavailable("the engine has stopped after an error, and the server ends.", code="engine_dead")

    def require_service(self) -> None:
        """Raises Unavailable where no new request is taken."""
        self.require_life()
        if self.draining:
            raise Unavailable("the server is ending and takes no new requests.", code="draining")

    @contextlib.contextmanager
    def open(self, jobs: list[Job], arrived: float, stream: bool) -> Iterator[Call]:
        """Have the engine serve `jobs`, all or none, and what is left of them ended when the block is left.

        `arrived` is time.monotonic() when the request did; what is no stream is read once, at its end. Raises
        Unavailable when there is no more service, Overloaded when the queue has no room.
        """
        self.require_service()
        self.require_room(len(jobs), sum(job.cost for job in jobs))
        call = Call(jobs, arrived, self.pause if stream else lambda: math.inf)
        self.streams += stream
        for job in jobs:
            self.jobs[job.request_id] = call, job
            self.waiting[job.request_id] = job
            self.commands.put(lambda job=job: self.add(job))
            self.metrics.accepted(len(job.tokens))
        self.idle.clear()
        left = self.limits.request_timeout - (time.monotonic() - arrived)
        timer = self.loop.call_later(left, self.expire, call)
        try:
            yield call
        finally:
            timer.cancel()
            self.streams -= stream
            self.cancel(call, "cancelled")

    def pause(self) -> float:
        """Seconds between two events of a stream, so that all streams together keep to their share."""
        return min(LONGEST_PAUSE, self.streams / self.limits.stream_events)

    def require_room(self, more: int = 1, cost: int = 0) -> None:
        """Raises Overloaded where `more` requests that may take `cost` tokens are too many to wait."""
        limits, requests, tokens = self.limits, len(self.waiting), sum(job.cost for job in self.waiting.values())
        # A request that finds nobody waiting is taken however long it is: the context bounds it.
        if requests and requests + more > limits.max_waiting:
            raise Overloaded(
                f"{requests} requests wait, and {more} more would exceed max_waiting = {limits.max_waiting}: try again "
                "later.", self.seconds_for(tokens),
            )  # fmt: skip
        if requests and tokens + cost > limits.max_waiting_tokens:
            raise Overloaded(
                f"requests of {tokens} tokens wait, and {cost} more would exceed max_waiting_tokens = "
                f"{limits.max_waiting_tokens}: try again later.", self.seconds_for(tokens),
            )  # fmt: skip

    def seconds_for(self, tokens: int) -> float:
        """How long so many tokens take at the rate of the last seconds."""
        rate = self.tokens_per_second()
        return min(LONGEST_RETRY, tokens / rate) if rate else 1

    def tokens_per_second(self) -> float:
        """New tokens, mean of the last seconds."""
        now = time.monotonic()
        while self.arrivals and self.arrivals[0][0] < now - RATE_SECONDS:
            self.arrivals.popleft()
        return sum(count for _, count in self.arrivals) / RATE_SECONDS

    def expire(self, call: Call) -> None:
        call.fail(TimedOut(
            f"the request took longer than request_timeout = {self.limits.request_timeout:g} seconds.",
            code="request_timeout",
        ))  # fmt: skip
        self.cancel(call, "timeout")

    def cancel(self, call: Call, reason: str) -> None:
        """End what is left of a call; its blocks are free before the next step."""
        for job in call.jobs:
            if self.jobs.pop(job.request_id, None):
                self.waiting.pop(job.request_id, None)
                self.commands.put(lambda request_id=job.request_id: self.abort(request_id))
                self.metrics.ended(reason, time.monotonic() - call.arrived)
        self.note_idle()

    def deliver(self, outputs: list[Output], started: set[str], now: float) -> None:
        """Hand a step's outputs to the calls that they are for."""
        for request_id in started:
            self.waiting.pop(request_id, None)
        new = 0
        for output in outputs:
            if output.request_id not in self.jobs:
                continue  # cancelled meanwhile
            call, job = self.jobs[output.request_id]
            if output.tokens:
                new += len(output.tokens)
                key = output.request_id, output.index
                self.metrics.came(len(output.tokens), now - call.arrived, call.last.get(key) and now - call.last[key])
                call.last[key] = now
            call.put(output)
            if output.finish_reason and not any(request_id == job.request_id for request_id, _ in call.going):
                del self.jobs[job.request_id]
                self.metrics.ended(output.finish_reason, now - call.arrived)
        if new:
            self.arrivals.append((now, new))
        self.note_idle()

    def note_idle(self) -> None:
        if not self.jobs:
            self.idle.set()

    async def drain(self, seconds: float) -> None:
        """Take no new requests, wait for those in flight, and fail those that are left after so many seconds."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.idle.wait()
        self.fail_all(Unavailable(
            f"the server ended before the request did, after drain_seconds = {seconds:g}.", code="draining"
        ))  # fmt: skip

    def fail_all(self, error: ApiError) -> None:
        for call in {call for call, _ in self.jobs.values()}:
            call.fail(error)
            self.cancel(call, "error")

    def die(self, error: BaseException) -> None:
        """The engine's thread has ended by an error."""
        self.dead = error
        self.fail_all(Failed("the engine has stopped after an error, and the server ends.", code="engine_dead"))
        self.died.set()
