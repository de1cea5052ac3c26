"""The guard: the stages every request passes, one module each, in the order of `gateway.app`."""
