"""End-to-end tests. The running product that they share is the fixture `product` of `tests.product`."""
