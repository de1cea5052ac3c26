"""The command groups: together with `gateway.cli` the only place that may import everything."""
