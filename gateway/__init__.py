"""The gateway: Envoy as the one public address, from a template and a Lua filter."""
