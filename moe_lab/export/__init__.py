"""A model as a pair of files: `__model__`, an ONNX graph, and `__params__`, all of its weights.

form      model -> the module that is traced: routing kept, each custom op one node
trace     that module -> a flat graph (torch.onnx)
simplify  constants, reshapes, names: the flat graph as a person would draw it
outline   modules -> functions of the graph
pair      graph -> the two files, written beside their folder and renamed
parity    the files against the model, in ONNX Runtime
netron    the viewer
"""
