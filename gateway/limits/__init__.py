"""Reservations and the fair queue."""
