// Classify the kit's pixels with Core ML and compare the probabilities: classify MODEL KIT_FOLDER N TOLERANCE
// macOS: swiftc classify.swift. Nothing is resized here: the .ppm files hold what the model takes. See INTEGRATE.md.
import CoreML
import CoreVideo
import Foundation

/// The pixels of a .ppm file, behind its header of one line.
struct Picture {
    let width: Int
    let height: Int
    let pixels: [UInt8]  // RGB, row by row

    init(contentsOf url: URL) throws {
        let bytes = [UInt8](try Data(contentsOf: url))
        let end = bytes.firstIndex(of: 10)!
        let header = String(decoding: bytes[..<end], as: UTF8.self).split(separator: " ")
        width = Int(header[1])!
        height = Int(header[2])!
        pixels = [UInt8](bytes[(end + 1)...])
    }

    /// As Core ML takes it: blue, green, red, and a fourth byte that is not read.
    func buffer() -> CVPixelBuffer {
        var made: CVPixelBuffer?
        CVPixelBufferCreate(nil, width, height, kCVPixelFormatType_32BGRA, nil, &made)
        let buffer = made!
        CVPixelBufferLockBaseAddress(buffer, [])
        let base = CVPixelBufferGetBaseAddress(buffer)!.assumingMemoryBound(to: UInt8.self)
        let row = CVPixelBufferGetBytesPerRow(buffer)
        for y in 0..<height {
            for x in 0..<width {
                let source = 3 * (y * width + x)
                let target = y * row + 4 * x
                base[target] = pixels[source + 2]
                base[target + 1] = pixels[source + 1]
                base[target + 2] = pixels[source]
                base[target + 3] = 255
            }
        }
        CVPixelBufferUnlockBaseAddress(buffer, [])
        return buffer
    }
}

func softmax(_ logits: [Float]) -> [Float] {
    let highest = logits.max()!
    let powers = logits.map { exp($0 - highest) }
    let sum = powers.reduce(0, +)
    return powers.map { $0 / sum }
}

let arguments = CommandLine.arguments
guard arguments.count == 5, let n = Int(arguments[3]), let tolerance = Float(arguments[4]) else {
    print("usage: classify MODEL KIT_FOLDER N TOLERANCE")
    exit(2)
}
let kit = URL(fileURLWithPath: arguments[2])
let model = try MLModel(contentsOf: MLModel.compileModel(at: URL(fileURLWithPath: arguments[1])))
let read = try JSONSerialization.jsonObject(with: Data(contentsOf: kit.appendingPathComponent("kit.json")))
let classes = (read as! [String: Any])["classes"] as! [String]
let bytes = try Data(contentsOf: kit.appendingPathComponent("logits.bin"))
let logits = bytes.withUnsafeBytes { [Float]($0.bindMemory(to: Float.self)) }

var worst: Float = 0
for number in 0..<n {
    let picture = try Picture(contentsOf: kit.appendingPathComponent("\(number).ppm"))
    let image = MLFeatureValue(pixelBuffer: picture.buffer())
    let input = try MLDictionaryFeatureProvider(dictionary: ["image": image])
    let answer = try model.prediction(from: input)
    let found = answer.featureValue(for: "classLabel_probs")!.dictionaryValue
    let first = number * classes.count
    let expected = softmax(Array(logits[first..<(first + classes.count)]))
    for (name, probability) in zip(classes, expected) {
        worst = max(worst, abs(found[name]!.floatValue - probability))
    }
}
// A probability moves by at most half of what the logits move by.
print("largest difference of probabilities \(worst), tolerance \(tolerance / 2)")
exit(worst <= tolerance / 2 ? 0 : 1)
