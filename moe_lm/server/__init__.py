"""An HTTP server around one engine, with OpenAI's API."""

from moe_lm.server.access import access
from moe_lm.server.app import make_app
from moe_lm.server.limits import Limits
from moe_lm.server.run import open_socket, serve, url_of
from moe_lm.server.service import Service

__all__ = ["Limits", "Service", "access", "make_app", "open_socket", "serve", "url_of"]
