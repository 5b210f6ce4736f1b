"""How a reply is scored: texts, numbers and patterns compared, whatever stands in them."""
