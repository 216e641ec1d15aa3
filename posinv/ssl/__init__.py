"""Self-supervised (SSL) speech models, batched so that padding changes nothing."""

from posinv.ssl.upstream import SSLUpstream

__all__ = ["SSLUpstream"]
