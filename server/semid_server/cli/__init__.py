"""The commands of a machine that serves, one module each, imported when called."""
