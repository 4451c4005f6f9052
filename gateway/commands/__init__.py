"""The `farebox` command, one module a group. Nothing of the server is imported before a command that needs it runs."""
