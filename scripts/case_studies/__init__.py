"""Case studies of wearable data over any endpoint with OpenAI's interface."""
