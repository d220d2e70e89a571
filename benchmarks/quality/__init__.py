"""Quality at equal training time, beside other libraries."""
