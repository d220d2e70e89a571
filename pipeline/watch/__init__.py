"""What looks at a model while it trains. No stage imports it, and no result depends on it."""
