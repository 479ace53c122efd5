"""Plug-ins for training frameworks, each in a module of its own that needs the framework."""
