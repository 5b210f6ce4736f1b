"""Ways out to other tools' formats and in from them: one file a format; none knows of a method but by peft's types."""
