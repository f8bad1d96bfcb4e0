"""What the server takes on, at most. Every bound but body_seconds is an option of serve.py."""

from dataclasses import dataclass

from moe_lm.config import require


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError on a bound that nothing could meet."""

    max_waiting: int = 256
    """Requests that wait for their first step; beyond it the answer is 429. A list of prompts is as many requests."""
    max_waiting_tokens: int = 1 << 18
    """Tokens of those that wait, prompts and all that they may become."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    body_seconds: float = 30
    """In which the body has to arrive."""
    request_timeout: float = 600
    """Seconds from a request's arrival to the end of its answer."""
    stream_events: int = 500
    """Events per second that all streams share; tokens that come between two events of a stream go together. Sending
    one takes 0.1 to 0.3 ms, in which a small model makes a token."""
    drain_seconds: float = 30
    """That requests in flight have to finish in after SIGTERM."""

    def __post_init__(self):
        for name in ("max_waiting", "max_waiting_tokens", "max_body", "stream_events"):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)} must be at least 1.")
        for name in ("body_seconds", "request_timeout"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be above 0.")
        require(self.drain_seconds >= 0, f"drain_seconds = {self.drain_seconds} must be at least 0.")
