"""One run: build, verify, time, observe, record. A sweep is many of them."""
