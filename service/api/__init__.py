"""The wire: OpenAI-shaped routes. Knows HTTP; decides nothing that a domain module could decide."""
