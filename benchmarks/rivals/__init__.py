"""What penstock is compared with: each back end used directly, and Prefect in an environment of its own."""
