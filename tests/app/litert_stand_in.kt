// What a test kit's Classify.kt uses of LiteRT's Java API. The model: logits are the means of the channels.
package org.tensorflow.lite

import java.io.File
import java.nio.ByteBuffer

class Tensor {
    fun shape() = intArrayOf(1, 3)
}

class Interpreter(model: File) : AutoCloseable {
    fun getOutputTensor(index: Int) = Tensor()

    fun run(input: Any, output: Any) {
        val pixels = input as ByteBuffer
        val sums = LongArray(3)
        for (place in 0 until pixels.limit()) sums[place % 3] += (pixels.get(place).toLong() and 255)
        @Suppress("UNCHECKED_CAST")
        val row = (output as Array<FloatArray>)[0]
        for (channel in 0..2) row[channel] = 3f * sums[channel] / pixels.limit()
    }

    override fun close() {}
}
