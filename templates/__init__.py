"""Jinja2 templates of shell scripts and pages, read as package data."""
