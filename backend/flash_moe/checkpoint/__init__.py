"""What is on disk: read headers, find the experts, plan, pack, and remember where models are."""
