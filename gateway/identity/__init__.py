"""Who is asking: credentials, and what they allow."""
