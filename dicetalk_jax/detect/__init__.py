"""Where faces are in images: two detectors with one interface.

`faces.FaceDetector` is the interface, `mtcnn` the default, whose weights come with this
package, and `yolo_face` the detector of the reference implementation. `choice` takes
the one that a model folder has, and chooses among several faces.
"""
