"""The embedded sample world: small pictures whose truth is known, and a miniature web of them.

config    how large the world is and how bad its web
scene     what a picture shows: one or two coloured shapes in places on a background
language  captions in several wordings, and which texts are true of a scene
render    the picture of a scene
texts     wrong texts as the web has them
plan      which URL shows which scene, with which fault and which text
world     the world as files
server    the web of a world, over HTTP on the loopback interface
audit     measured facts about a run on a world
"""
