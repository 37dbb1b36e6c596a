"""Multiple-choice exams over any endpoint with OpenAI's interface."""
