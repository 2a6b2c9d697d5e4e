// Classify the kit's pixels with LiteRT and compare the logits: classify MODEL KIT_FOLDER N TOLERANCE
// Android: implementation("com.google.ai.edge.litert:litert"), and call `check` from an instrumented test.
// Nothing is resized here: the .ppm files hold what the model takes. See INTEGRATE.md.
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.system.exitProcess
import org.tensorflow.lite.Interpreter

/** A model file: RGB pixels, row by row, to one logit for each class. */
class Classifier(model: File) : AutoCloseable {
    private val interpreter = Interpreter(model)
    private val classes = interpreter.getOutputTensor(0).shape().last()

    fun logits(pixels: ByteArray): FloatArray {
        val input = ByteBuffer.allocateDirect(pixels.size).order(ByteOrder.nativeOrder())
        input.put(pixels)
        input.rewind()
        val output = arrayOf(FloatArray(classes))
        interpreter.run(input, output)
        return output[0]
    }

    override fun close() = interpreter.close()
}

/** The pixels of a .ppm file, behind its header of one line. */
fun readPixels(file: File): ByteArray {
    val bytes = file.readBytes()
    return bytes.copyOfRange(bytes.indexOf('\n'.code.toByte()) + 1, bytes.size)
}

/** The largest difference between the model's logits and the kit's, over its n pictures. */
fun check(model: File, kit: File, n: Int): Float {
    val bytes = ByteBuffer.wrap(File(kit, "logits.bin").readBytes())
    val expected = bytes.order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    val found = Classifier(model).use { classifier ->
        (0 until n).flatMap { classifier.logits(readPixels(File(kit, "$it.ppm"))).toList() }
    }
    return found.maxOf { abs(it - expected.get()) }
}

fun main(arguments: Array<String>) {
    if (arguments.size != 4) {
        System.err.println("usage: classify MODEL KIT_FOLDER N TOLERANCE")
        exitProcess(2)
    }
    val (model, kit, n, tolerance) = arguments
    val worst = check(File(model), File(kit), n.toInt())
    println("largest difference of logits $worst, tolerance $tolerance")
    exitProcess(if (worst <= tolerance.toFloat()) 0 else 1)
}
