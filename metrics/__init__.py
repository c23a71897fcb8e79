"""What is measured about a model, and how sure each number is."""
