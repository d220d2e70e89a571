"""MLflow tracking of the stages; the one place besides the registry that imports mlflow."""
