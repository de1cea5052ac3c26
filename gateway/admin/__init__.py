"""The ops port: metrics, health, and later the admin API and the console."""
