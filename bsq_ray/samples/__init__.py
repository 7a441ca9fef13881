"""Sample photographs and clips from installed or downloaded packages."""
