"""Serving: an engine that runs many requests on one model, and an HTTP server in front of it."""
