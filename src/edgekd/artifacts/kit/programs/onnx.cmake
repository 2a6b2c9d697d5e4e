# cmake -S . -B build -DONNXRUNTIME=/folder/of/onnxruntime-linux-x64 && cmake --build build
cmake_minimum_required(VERSION 3.16)
project(classify CXX)
set(CMAKE_CXX_STANDARD 17)
add_executable(classify classify.cpp)
target_include_directories(classify PRIVATE ${ONNXRUNTIME}/include)
target_link_directories(classify PRIVATE ${ONNXRUNTIME}/lib)
target_link_libraries(classify PRIVATE onnxruntime)
