"""The part of OpenAI's chat protocol that is spoken here: what clients send and what they get."""
