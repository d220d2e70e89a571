"""Adversarial refinement: losses, discriminator, few-pass generator, step and guards."""
