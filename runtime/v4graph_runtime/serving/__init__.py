"""Many requests on one session: scheduling, an OpenAI-compatible server and its page."""
