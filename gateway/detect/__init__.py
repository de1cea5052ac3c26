"""Detectors of sensitive content and the streaming redactor."""
