"""Serve a real model on this machine: fetch it, start the server, ask it something, stop it."""
