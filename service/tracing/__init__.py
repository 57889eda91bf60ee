"""OpenTelemetry traces of requests and jobs; nothing of it is even imported while no endpoint is configured."""
