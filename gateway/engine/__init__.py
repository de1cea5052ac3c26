"""Engines: launching and sealing them, watching them, and speaking to them."""
