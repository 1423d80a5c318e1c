"""The one-machine stack: embedded PostgreSQL and Swift, the services and the gateway under one supervisor."""
