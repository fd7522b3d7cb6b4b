"""Recommendations for users: retriever, business rules, HTTP API."""
