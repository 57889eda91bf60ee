"""What answers: HTTP, tenants, jobs, the database and the engine. What is learned lives in `adapters`."""
