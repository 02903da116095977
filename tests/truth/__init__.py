"""Drive a real llama.cpp server and compare what the exporter says with what really happened."""
