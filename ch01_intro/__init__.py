"""Chapter 1: a baseline on one device, where its time and memory go, and what several devices bring."""
