"""End-to-end tests share one running product; see `tests.product`."""

from tests.product import product

__all__ = ["product"]
