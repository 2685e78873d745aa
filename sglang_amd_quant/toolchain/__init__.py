"""From kernel sources to code objects, and what the machine code says about itself. Needed to build, never to serve."""
