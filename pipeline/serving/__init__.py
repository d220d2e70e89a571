"""The champion as an HTTP service: OpenAI's images API, batches, following the alias, a page to try it."""
