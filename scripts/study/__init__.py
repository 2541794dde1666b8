"""The study of docs/results.md: five methods on the same data with the same model, tuned alike, over seeds and batch sizes."""
