"""Labels, decisions and obligations."""
